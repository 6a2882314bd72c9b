"""What is planned for: models as their config.json describes them, and cards. No arithmetic on bytes of a step, no torch."""
