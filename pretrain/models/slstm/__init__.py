"""sLSTM: the scalar-memory cell of xLSTM, with hidden states that feed back within each head."""
