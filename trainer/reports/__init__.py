"""Reports: charts, HTML pages and grids of images."""
