"""Results as a page: one self-contained HTML file, no network."""
