"""Place Q/DQ sites on the edges of the graph, from target rules and layer rules."""
