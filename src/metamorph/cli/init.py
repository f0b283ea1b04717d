"""`metamorph init`: join an LLM and a vision encoder into a model that can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metamorph.cli.terminal import quiet_libraries
from metamorph.places import check_target


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("init")(run)


def run(
    llm: Annotated[str, typer.Option(help="Causal LM with a chat template: a directory or a name on the hub.")],
    vision: Annotated[str, typer.Option(help="Vision encoder: a directory or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="Directory for the model and its processor.")],
    num_visual_tokens: Annotated[int, typer.Option(help="Visual tokens per image: a square number.")] = 64,
    pooling: Annotated[str, typer.Option(help="From patches to visual tokens: bilinear or area.")] = "bilinear",
    feature_layer: Annotated[int, typer.Option(help="Which hidden states of the encoder; -1 is the last block's output.")] = -1,
    post_layernorm: Annotated[bool, typer.Option(help="Apply the encoder's last layer norm to them.")] = False,
    normalize: Annotated[bool, typer.Option(help="Give each visual token norm 1.")] = True,
    projector: Annotated[str, typer.Option(help="mlp or linear.")] = "mlp",
    vision_head: Annotated[str, typer.Option(help="mlp or linear.")] = "mlp",
    visual_loss: Annotated[str, typer.Option(help="cosine, l1 or mse.")] = "cosine",
    visual_loss_weight: Annotated[float, typer.Option(help="Of the visual loss in the total.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the new projector and vision head.")] = 0,
) -> None:
    """Add the image tokens to an LLM, join it with a vision encoder, and check its chat template on a probe conversation."""
    check_target(out, "--out", directory=True)
    quiet_libraries()
    from metamorph.model.conversion import initialize

    model, processor = initialize(
        llm,
        vision,
        seed=seed,
        num_visual_tokens=num_visual_tokens,
        pooling=pooling,
        vision_feature_layer=feature_layer,
        vision_post_layernorm=post_layernorm,
        normalize_visual_tokens=normalize,
        projector_type=projector,
        vision_head_type=vision_head,
        visual_loss=visual_loss,
        visual_loss_weight=visual_loss_weight,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    for name, module in model.named_children():
        typer.echo(f"{name:16} {sum(p.numel() for p in module.parameters()):>14,} parameters")
    height, width = processor.image_size
    typer.echo(f"{out}: an image of {height} x {width} pixels is {processor.num_visual_tokens} visual tokens. Next: `metamorph train`.")
