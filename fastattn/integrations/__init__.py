"""fastattn inside other libraries. Each module imports its library only when it is asked to do something."""
