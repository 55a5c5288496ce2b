"""The trainer and what it needs: engines, parameter groups, checkpoints, tracking, checks before it begins."""
