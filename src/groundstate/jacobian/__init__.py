"""The derivative of a network by its input, per sample: the function without side effects, probes, exact routes, cuts.

``function`` makes a plain function of a network; ``chain`` knows closed forms for chains of linear layers; ``exact``
forms output Grams by any route and chooses among them; ``probes`` estimates; ``cuts`` splits a network in two.
"""
