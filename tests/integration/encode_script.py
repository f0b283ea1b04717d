"""Encodes test rows, started by tests as a process of its own: alone (to be killed) or under torchrun."""

import sys
import time
from pathlib import Path

import torch

from metamorph.data.source import open_source
from metamorph.training.config import ModelConfig
from metamorph.training.device import processes, rank
from metamorph.training.encoding import encode_images, encoder_of, spec_of


def main(llm: str, vision: str, rows: str, out: str, slow: str) -> None:
    torch.set_num_threads(1)
    with processes(torch.device("cpu")):
        files = encoder_of(ModelConfig(llm=llm, vision=vision, overrides={"num_visual_tokens": 4}))
        encoder = files.load()
        asked = []

        def encode(pixels):
            asked.append(len(pixels))
            time.sleep(float(slow))
            return encoder(pixels)

        result = encode_images(
            [open_source(Path(rows), needs_answer=False)],
            encode,
            files.processor.prepare_image,
            spec_of(files),
            Path(out),
            dtype="float32",
            batch_size=2,
            round_size=3,
            writing={"shard_seconds": 0.0},
        )
        print(f"rank {rank()} encoded {sum(asked)}", flush=True)
        if rank() == 0:
            print(f"total {result.done} {result.images} {result.unique} {result.encoded} {len(result.faults)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
