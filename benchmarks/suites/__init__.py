"""One file per question; each has ``cells()`` and the ``DEVICES`` that can run them."""
