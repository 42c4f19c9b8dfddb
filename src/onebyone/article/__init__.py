"""The article on 1×1 convolutions: measurements of all its claims."""

from onebyone.article.measure import measure_article as measure_article
from onebyone.article.page import render_article as render_article
from onebyone.article.record import ArticleRecord as ArticleRecord
