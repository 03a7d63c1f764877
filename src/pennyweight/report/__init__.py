"""What people look at: plots of what was planned and measured."""
