"""Types that converters name in their signatures."""


class Tensor:
    pass


class TensorSpec:
    pass


class DataType:
    pass
