"""mLSTM in the block of the first xLSTM: up projection before the cell, convolution, gated output."""
