"""Pictures with questions, drawn from a seed. `tasks` lists what can be drawn."""
