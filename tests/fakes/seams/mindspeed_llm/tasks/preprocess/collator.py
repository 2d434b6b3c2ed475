class PairwiseDataCollatorWithPadding:
    def __call__(self, features, repeat=1):
        raise NotImplementedError
