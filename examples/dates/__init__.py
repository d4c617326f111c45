"""Dates, as people write them, into ISO dates: an encoder-decoder trained from nothing in minutes on a CPU.

    python -m examples.dates                  # train, test, write examples/dates/output/
    python -m examples.dates --interactive    # then type dates of your own

"Thursday, 5 March 1987", "5-Mar-87", "05/03/1987" and four more formats become "1987-03-05", character by character.
The model is `fastattn.nn.EncoderDecoder`: the encoder reads the characters, padding masked by their number; the decoder
writes one character after the other until it says EOS. It is trained by teacher forcing (all characters in one call
under a causal mask) and used through `fastattn.generate` (one character per step, with a KV cache). The program shows
that the two are the same function, and measures what the cache saves: about half of the time for 500 dates at once; a
single one is slower with it, since eleven short steps cost calls, not arithmetic. One date in twenty is kept for the
test, one for validation; training sees neither, in no format.

The output folder: metrics.json, training.png, attention.png, and checkpoint.pt, from which --resume goes on.

To read: data.py (formats, tokens, parts), train.py (model, recipe, loop), evaluate.py (what the trained model does),
plots.py, cli.py.
"""
