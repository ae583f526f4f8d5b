"""What the three scripts are made of. The README lists the files by family."""
