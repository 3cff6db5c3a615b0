"""What the layers of a network see: second moments of their inputs."""
