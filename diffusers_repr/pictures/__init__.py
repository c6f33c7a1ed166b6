"""What every picture of the library is drawn with: grids of samples, and matplotlib where it is wanted."""
