"""RTN: round each weight to the nearest value of its group's grid. What all others must beat.

It looks at no text: no scales, the full range of each group, the nearest codes (see `base`).
"""

from salience.methods.base import Method

RTN = Method("rtn", reads_text=False)
