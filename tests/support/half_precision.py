"""Which of torch's layers run in bfloat16 here: an LSTM needs instructions that not every processor has."""

import pytest
import torch


def runs_lstm() -> bool:
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        return False
    return True


needs_lstm = pytest.mark.skipif(not runs_lstm(), reason="this processor has no LSTM in bfloat16")
