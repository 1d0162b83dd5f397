"""What numbers mean: from records to samples, intervals, comparisons, and a race. Knows numbers only."""
