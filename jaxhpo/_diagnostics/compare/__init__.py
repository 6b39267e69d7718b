"""`compare`: measures hypergradient methods on one problem, and recommends one of them."""
