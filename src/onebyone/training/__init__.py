"""Training, distillation and reconstruction."""
