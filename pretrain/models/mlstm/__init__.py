"""mLSTM: the matrix-memory cell of xLSTM in the layout of xLSTM-7B."""
