"""The words that every room uses: errors, points, records, keys. Knows neither torch nor vLLM."""
