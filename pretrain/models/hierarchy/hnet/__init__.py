"""H-Net: chunks whose boundaries the model itself chooses."""
