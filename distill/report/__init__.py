"""What came of a run: quality, cost, the page, charts and figures."""
