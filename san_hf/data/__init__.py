"""Data to train and measure on."""
