"""NF4: each weight to the nearest of sixteen values that suit a normal distribution.

What QLoRA made common (Dettmers et al., arXiv 2305.14314). It is plain rounding with a better table
than the uniform one (`salience.codebook`), looks at no text and searches nothing; AWQ at the same
size does better.
"""

from salience.methods.base import Method

NF4 = Method("nf4", reads_text=False)
