"""A batch of clicks in row numbers: who clicked what, what is a negative of whom, on one process or several."""
