"""Many runs from one description: grids, plans, and the arrays that they are submitted as."""
