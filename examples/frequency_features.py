"""What frequency says about the tokens of an image: spectrum, energy by band, energy of every token.

    python examples/frequency_features.py

The picture is made here: a smooth gradient with a finely striped disc. Its 8 x 8 patches are the tokens.
"""

import torch

import mlip_kernels as mk

SIDE, PATCH = 128, 8
GRID = (SIDE // PATCH, SIDE // PATCH)


def picture() -> torch.Tensor:
    """``[SIDE, SIDE]`` in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    disc = (x - 0.65) ** 2 + (y - 0.4) ** 2 < 0.05
    return torch.where(disc, 0.5 + 0.5 * torch.sin(150 * (x + 0.7 * y)), 0.3 * x + 0.5 * y)


def main() -> None:
    patches = picture().reshape(GRID[0], PATCH, GRID[1], PATCH).permute(0, 2, 1, 3)
    tokens = patches.reshape(1, GRID[0] * GRID[1], PATCH * PATCH)  # [B, N, D]: a token holds the pixels of its patch

    spectrum = mk.dct(tokens, grid=GRID)  # over the grid, for each of the D channels
    torch.testing.assert_close(mk.idct(spectrum, grid=GRID), tokens)
    squares = spectrum.square().reshape(*GRID, -1).sum(-1)
    lowest = squares[: GRID[0] // 2, : GRID[1] // 2].sum() / squares.sum()
    print(f"energy in the lowest quarter of the coefficients: {lowest:.1%}")

    bands = mk.band_energy(tokens, 4, grid=GRID).sum(-1)[0]  # [bands, D], summed over channels
    torch.testing.assert_close(bands.sum(), tokens.square().sum())  # Parseval: no energy is lost
    for band, energy in enumerate(bands / bands.sum()):
        print(f"  frequencies {band / 4:.2f} to {(band + 1) / 4:.2f}: {energy:.1%}")

    energy = mk.token_energy(tokens, 0.25, grid=GRID)[0].reshape(GRID)
    shades = (energy / energy.max() * 4.99).long()
    print("high-frequency energy of every token: the striped disc, which `guide=` lets merge last")
    for row in shades:
        print("  " + "".join(" .:*#"[shade] * 2 for shade in row))

    highest = energy.flatten().sort(descending=True).values
    quarter = highest[: len(highest) // 4].sum() / highest.sum()
    print(f"a quarter of the tokens has {quarter:.1%} of that energy")

    small = mk.spectral_resize(tokens, GRID, (8, 8))
    print(f"resized to 8 x 8 by its spectrum: {list(small.shape)}, mean {small.mean():.3f} of {tokens.mean():.3f}")


if __name__ == "__main__":
    main()
