"""What DeepSpeed is told: engine, optimizer state, experts. Every write to a private attribute of DeepSpeed is here."""
