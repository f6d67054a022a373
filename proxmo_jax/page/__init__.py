"""A page that shows rollouts turn by turn: what every estimator gives each turn, in one HTML file."""
