"""What several policies share: selection, votes, cells, cascades, pages."""
