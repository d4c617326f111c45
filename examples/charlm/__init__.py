"""A character language model: nanoGPT's architecture and today's, trained alike. See cli.py for the program.

python -m examples.charlm
"""
