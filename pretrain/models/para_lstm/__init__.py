"""ParaLSTM: an LSTM with elementwise recurrence and peepholes, solved in parallel by Newton's method."""
