"""What em_ft.py and em_rl.py stand on: the optimiser, the run's folder, and its report."""
