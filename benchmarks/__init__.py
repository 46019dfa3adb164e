"""The public benchmarks: pictures of real weights, drawn, judged and put into tables."""
