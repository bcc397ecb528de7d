"""What `coterie demo` runs: text from the Python installation, a small public model, the arms, the report."""
