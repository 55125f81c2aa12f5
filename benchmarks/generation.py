"""How long it takes to generate 20 sequences of 16 frames and write each as a GIF.

    python benchmarks/generation.py          the paper's sizes for Sprites, 40 experts, untrained
    python benchmarks/generation.py --run RUN       a run of examples/vdsm.py

What an untrained decoder paints is noise of many colours, on which a GIF's palette takes long to find; what it takes to
decode does not depend on the weights. The paper reports 0.2 s on a GPU, without saying what is included.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from measuring import arguments_of, report, time_in_turns

from seqdisent import generate
from seqdisent.plotting import save_gif

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import vdsm as example
from command_line import load_run


def main() -> None:
    arguments = arguments_of(__doc__, sequences=20, steps=16, run="")
    if arguments.run:
        vdsm, _ = load_run(example.EXAMPLE, Path(arguments.run))
    else:
        vdsm = example.VDSM((3, 64, 64), example.Sizes(40)).eval()

    @torch.inference_mode()
    def clips():
        return generate(vdsm.model, num_sequences=arguments.sequences, num_steps=arguments.steps)["x"].mean

    drawn = clips()
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "generate": clips,
            "write GIFs": lambda: [save_gif(clip, Path(folder) / f"{i}.gif") for i, clip in enumerate(drawn)],
        }
        seconds = time_in_turns(ways, arguments.repeats)
    rows = [{"what": name, "seconds": median(times)} for name, times in seconds.items()]
    rows.append({"what": "both", "seconds": sum(row["seconds"] for row in rows)})
    report("generation", arguments, rows)


if __name__ == "__main__":
    main()
