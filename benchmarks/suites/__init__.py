"""One file per question. Each has ``cells()`` and the ``DEVICES`` that can run them."""
