"""Programs that run other software: each file has functions that open an export in one engine, or unpack its weights.

``run.py`` is started with the Python of the engine's environment, which need not have qtool, and calls one of the other
files. None of them imports qtool. ``qtool/exporters/_outside.py`` is the other end of the pipe.

A file defines some of: ``load(folder)``, which returns a model that computes in float32 where the engine can;
``logits(model, tokens)`` of one text, int64 ``[t]`` -> float32 ``[t, vocabulary]``; ``weights(folder)``, which yields
each packed weight in float32 by its name; and ``text_tokens(model, text)``, the tokens that the engine makes of a text.
``load(folder, float32=True)`` is for engines that round inputs otherwise.
"""
