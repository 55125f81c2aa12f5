"""What a bank of experts costs: forward and backward of the blended decoder against one shared decoder.

    python benchmarks/blending.py

The same frames, the paper's sizes (40 experts; 512, 256, 128 and 64 channels; 64 x 64 x 3 pixels). "grouped" is the
same blend through one grouped convolution a layer for the whole batch, which was tried and is slower on a CPU.
"""

from __future__ import annotations

from statistics import median

import torch
from measuring import arguments_of, ratio, report, time_in_turns
from torch.nn import functional as F

from seqdisent import ConvDecoder, MixtureOfExpertsConvDecoder
from seqdisent.experts import blend


def grouped(decoder: MixtureOfExpertsConvDecoder, latents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One grouped convolution a layer: sequences as groups, frames as the batch."""
    hidden = latents.transpose(0, 1).flatten(1)[..., None, None]
    for i, (bank, biases) in enumerate(zip(decoder.kernels, decoder.biases, strict=True)):
        options = {} if i == 0 else {"stride": 2, "padding": 1}
        hidden = F.leaky_relu(hidden) if i else hidden
        hidden = F.conv_transpose2d(
            hidden,
            blend(bank, weights).flatten(0, 1),
            blend(biases, weights).flatten(),
            groups=len(latents),
            **options,
        )
    return hidden.unflatten(1, (len(latents), -1)).transpose(0, 1)


def main() -> None:
    arguments = arguments_of(__doc__, batch=20, experts=40)
    decoder = MixtureOfExpertsConvDecoder(30 + arguments.experts, arguments.experts)
    shared = ConvDecoder(decoder.latent_dim)
    rows = []
    for num_steps in (8, 16):
        latents = torch.randn(arguments.batch, num_steps, decoder.latent_dim, requires_grad=True)
        weights = torch.softmax(torch.randn(arguments.batch, arguments.experts), -1).requires_grad_()
        expected = decoder(latents, weights)
        torch.testing.assert_close(grouped(decoder, latents, weights), expected, atol=1e-3, rtol=1e-3)
        gradient = torch.randn_like(expected)
        del expected

        def step(run, parameters, gradient=gradient, latents=latents, weights=weights):
            latents.grad = weights.grad = None
            for parameter in parameters.parameters():
                parameter.grad = None
            run().backward(gradient)

        ways = {
            "shared": lambda latents=latents: step(lambda: shared(latents), shared),
            "blended": lambda latents=latents, weights=weights: step(lambda: decoder(latents, weights), decoder),
            "grouped": lambda latents=latents, weights=weights: step(
                lambda: grouped(decoder, latents, weights), decoder
            ),
        }
        seconds = time_in_turns(ways, arguments.repeats)
        wanted = {8: 1.45, 16: 1.30}[num_steps]
        rows += [
            {
                "frames a sequence": num_steps,
                "decoder": way,
                "seconds": median(seconds[way]),
                "times the shared one": ratio(seconds, way, "shared"),
                "wanted": wanted if way == "blended" else "",
            }
            for way in ways
        ]
    report("blending", arguments, rows)


if __name__ == "__main__":
    main()
