"""Clean and corrupted texts of several lengths, as random tokens of the tiny models."""

import torch

LENGTHS = (20, 27, 20, 24)
"""Of each pair; all longer than twice the sliding window of 8."""
FIRST_DIFFERENCE = (3, 12, 0, 9)


def make_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Clean texts in rows 0 to 3, corrupted ones in rows 4 to 7, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((2 * len(LENGTHS), max(LENGTHS)), 2)
    for pair, (length, first) in enumerate(zip(LENGTHS, FIRST_DIFFERENCE, strict=True)):
        clean = torch.randint(3, 400, (length,), generator=generator)
        corrupted = torch.randint(3, 400, (length,), generator=generator)
        corrupted[:first] = clean[:first]
        tokens[pair, :length] = clean
        tokens[pair + len(LENGTHS), :length] = corrupted
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS * 2)[:, None]).long()
    return tokens, mask
