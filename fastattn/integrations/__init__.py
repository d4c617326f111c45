"""fastattn inside other libraries. Each module imports its library on first use."""
