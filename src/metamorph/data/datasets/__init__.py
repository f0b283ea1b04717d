"""The data sets of the paper (section 5), each read from the layout in which it is published: one file, one `source` function per data set.

    metamorph.data.datasets.visual_cot.source("/data/Visual-CoT")

A recipe names the function by its dotted path. The pages below docs/datasets say where each data set is from and what we could not verify.
"""
