"""What every method costs in accuracy and saves in time, in small: `make accuracy`, or `python -m accuracy --help`.

Fashion-MNIST (70,000 labelled photographs of clothes, 28 x 28) and a vision transformer of 49 tokens. A dense model is
trained for every seed; each method begins as that model, is brought to the same parts of its multiply-adds, and is
fine-tuned on as many images as the others; narrower dense models are trained for as long as both together. Everything
is a cell (`cells`): kept under the configuration and the source that made it, so that a run that was killed goes on.
Differences come with bootstrap intervals, paired over seeds and test images (`intervals`); the claims of the papers
that can be tried so are, with what became of them (`claims`).
"""
