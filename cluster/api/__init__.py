"""What the cluster's brain sees and says. Standard library only."""
