"""Other trainers: their rollouts in, advantages of their turns out."""
