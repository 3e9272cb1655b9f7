"""How frozen networks that were trained on square pictures get pictures of other shapes."""

import math


def grid_of_equal_area(side: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of cells for a picture of height x width: about ``side²`` cells, in the picture's aspect as far
    as whole cells allow; exactly ``side`` of each for a square."""
    stretch = math.sqrt(height / width)
    return max(1, round(side * stretch)), max(1, round(side / stretch))
