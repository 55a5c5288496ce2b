"""Tasks that tell architectures apart, made from a seed: `transpoint tasks` trains each architecture on each."""
